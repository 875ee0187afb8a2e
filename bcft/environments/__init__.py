"""Built-in tasks, one file each: its problems, its demonstrations and its environment."""
