"""A layer kind of the tests' own: an elementwise gated running mean. Nothing in nha_megatron knows it.

    m_t = f_t m_{t-1} + (1 - f_t) v_t        v = W_v (s x), f = sigmoid(W_f (s x) + b), f = 0 at the first token of a document
    out = W_o m

It is the example of docs/how_to_add_a_layer_kind.md: config.py and cost.py without torch, layer.py with Megatron, kind.py joins them.
"""
