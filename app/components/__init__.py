"""Components that draw in the browser, each with its own script and style."""
