"""Full attention over context ranks, tokens contiguous."""
