"""The operator alone: forward, backward, a memory, decoding. Runs in a second on a CPU: python examples/operator_alone.py"""

import torch
from torch.nn.functional import logsigmoid

from nha_kernels import decode_memory, nha_attention, nha_decode_step

BATCH, TOKENS, HEADS, KV_HEADS, CHANNELS, SLOTS, WINDOW = 1, 200, 8, 2, 64, 16, 32


def main() -> None:
    torch.manual_seed(0)
    q = torch.randn(BATCH, TOKENS, HEADS, CHANNELS, requires_grad=True)
    k, v = (torch.randn(BATCH, TOKENS, KV_HEADS, CHANNELS, requires_grad=True) for _ in range(2))
    z = torch.randn(BATCH, TOKENS, KV_HEADS, SLOTS, requires_grad=True)
    g = logsigmoid(z) / 8  # log-gates: what a slot keeps when a token is written into it is exp(g)

    # Forward and backward over all tokens at once, as in training.
    out = nha_attention(q, k, v, g, window=WINDOW)
    out.square().mean().backward()
    print(f"output {tuple(out.shape)}, gradient of the gates {z.grad.norm():.2e}")  # type: ignore[union-attr]

    with torch.no_grad():
        # The same in two parts: the second one continues from the memory of the first.
        first, rest = slice(0, 150), slice(150, TOKENS)
        _, memory = nha_attention(q[:, first], k[:, first], v[:, first], g[:, first], window=WINDOW, return_memory=True)
        continued = nha_attention(q[:, rest], k[:, rest], v[:, rest], g[:, rest], window=WINDOW, memory=memory)
        print(
            f"memory of {memory.length.item()} tokens: {memory.num_bytes:,} bytes; differs by {(continued - out[:, rest]).abs().max():.1e}"
        )

        # And token by token: the memory is updated in place, its size stays.
        state = decode_memory(memory)
        steps = [nha_decode_step(q[:, [t]], k[:, [t]], v[:, [t]], g[:, [t]], state) for t in range(150, TOKENS)]
        print(f"decoded {len(steps)} tokens; differs by {(torch.cat(steps, dim=1) - out[:, rest]).abs().max():.1e}")


if __name__ == "__main__":
    main()
