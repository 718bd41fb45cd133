"""The forward for Hopper GPUs (compute capability 9.0): slots at the borders of chunks of 64 tokens, one program for a chunk's 256 rows.

prepare.py    per chunk and KV head: factors of decays, what the chunk writes, rotated keys
borders.py    slots before every chunk, and before every segment of the backward
attend.py     slots and window of 64 tokens and four query heads, in Gluon: operands in shared memory, products by wgmma
forward.py    the three of them for a call, and the calls that they serve
"""
