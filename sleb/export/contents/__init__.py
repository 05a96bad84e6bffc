"""What goes into the folder of a smaller model: tensors, config, and the other files of its source."""
