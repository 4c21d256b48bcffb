"""Rules that edit a draft of the graph before its affine forms are taken, one a module, and what several of them use.

``reptool.graph.revise`` has the rules and their order; docs/graph-rules.md says what each is for.
"""
