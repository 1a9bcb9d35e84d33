"""What the processes of a cluster share: the plan, the reports of machines, and the work queue in Valkey.

Knows Valkey and every key in it; never activations or weights.
"""
