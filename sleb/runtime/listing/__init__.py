"""All runs of a folder, quickly: what is known of each is kept in memory and in an index on disk."""
