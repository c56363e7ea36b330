"""Several processes that work on one model together: how they find, hear and lose each other."""
