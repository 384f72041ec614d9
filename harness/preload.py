"""Imports what the lab's services need, once, in the parent that they are forked from.

The one module with work at import: that is its purpose. ``gc.freeze`` keeps the collector from touching, and so
copying, the shared pages in every child.
"""

import gc

import harness.serve

harness.serve.load_all()
gc.collect()
gc.freeze()
