"""Who owns device, process groups, optimizer, gradient reduction and precision."""
