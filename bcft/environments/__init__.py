"""The package's own environments, one file each."""
