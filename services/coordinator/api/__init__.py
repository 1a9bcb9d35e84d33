"""What clients see: routes, the bodies they receive and return, and the document that describes them.

Knows HTTP and JSON, no stages and no KV rows.
"""
