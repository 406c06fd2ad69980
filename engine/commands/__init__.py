"""The commands of `lethe`, one file each where they are long, and the options that several of them take."""
