"""Parts of pages: forms, choices, and jobs that are watched."""
