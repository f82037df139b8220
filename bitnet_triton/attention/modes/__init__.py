"""The modes of this package, one file each."""
