"""The fast engine: the numbers of :mod:`colada.generation`, from preallocated memory and with less work."""
