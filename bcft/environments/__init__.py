"""Built-in environments, one file a task: its problems, demonstrations and environment together."""
