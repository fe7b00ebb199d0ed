"""The annex: the methods that DMax is compared with, which build on the heart of the package.

Nothing in the heart imports them, except lazily by name through its tables.
"""
