"""Diagnostics of gradient masking: probes that measure evidence, and rules that raise flags."""
