"""Other projects' problems, one file each. A project is an extra: it is imported only where a recipe names it."""
