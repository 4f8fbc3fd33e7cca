"""Model code and files that executor and trainer share: a library, not a process."""
