"""`dmax reproduce`: a published table measured anew, every cell beside its published value.

A table is data (`tables/*.yaml`, read by `table`): rows are methods, columns are benchmarks, and
each cell has the figures that were published for it. `run` measures the cells one after another and
`page` shows them.
"""
