"""Everything that is not DMax: other decoding methods, objectives and trained heads.

The heart of the package never imports this folder. It finds what stands here by name, through the
tables of strategies (`dmax.decoding`) and objectives (`dmax.training`).
"""
