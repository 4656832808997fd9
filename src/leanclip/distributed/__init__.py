"""Devices, process groups, collectives, model wrapping and launching."""
