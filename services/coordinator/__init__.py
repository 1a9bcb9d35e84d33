"""The coordinator: takes requests, forms the steps that stages compute, and answers with text.

Knows requests, tokens and text; never layers or KV rows.
"""
