"""Whether a robustness figure can be believed: evidence of gradient masking, and the rules that judge it."""
