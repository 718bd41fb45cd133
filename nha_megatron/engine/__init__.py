"""Who owns device, process groups, optimizer, gradient reduction and precision.

layout.py, device.py         which rank does what, and on which device
cpu_workarounds.py           Megatron-core on a CPU
base.py, create.py           what an engine is, and the one that a configuration names
forward.py, finite.py        a micro batch through the model; a check over all ranks
optimizer_state.py           the form of the optimizer's state that every engine reads
megatron/, deepspeed/        what one engine alone knows
"""
