"""IFEval's 25 checkable instructions (arXiv:2311.07911), written from the behaviour of the reference checkers."""
