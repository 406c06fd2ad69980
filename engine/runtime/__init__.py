"""Services of the machine: device, process group, files, locks, memory and versions."""
