"""The fast engine: the numbers of :mod:`colada.generate.reference`, from memory made once, with less work."""
