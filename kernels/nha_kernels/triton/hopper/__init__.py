"""The forward for Hopper GPUs (compute capability 9.0): slots at the borders of chunks of 64 tokens, one program for a chunk's 256 rows.

conditions.py  the calls that it serves; needs no triton
gates.py       per chunk and KV head: every factor that is formed from the gates
prepare.py     what the chunk adds to the slots, and its keys rotated
borders.py     slots before every chunk, and before every segment for the backward
attend.py      slots and window of 64 tokens and four query heads, in Gluon: operands in shared memory, products by wgmma
forward.py     the four kernels of a call
"""
