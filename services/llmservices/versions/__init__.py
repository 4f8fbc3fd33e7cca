"""Versions of models as they lie on the disk, for everybody who reads them: a library, not a
process."""
