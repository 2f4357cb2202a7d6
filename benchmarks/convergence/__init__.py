"""Which optimizer gets there first, how sure that is, and whether the theory's rates show."""
