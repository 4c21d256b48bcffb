"""The order in which a draft is revised before its affine forms are taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reptool.graph.rules.batches import run_in_batches
from reptool.graph.rules.borders import read_borders
from reptool.graph.rules.centring import centre_maps
from reptool.graph.rules.concat import scale_branches
from reptool.graph.rules.edits import allow_any_layout, tidy
from reptool.graph.rules.factors import hand_factors_back
from reptool.graph.rules.flattening import flatten_scales
from reptool.graph.rules.folds import unfold_heads
from reptool.graph.rules.gains import hand_gains_back
from reptool.graph.rules.gates import raise_gates, scale_gates
from reptool.graph.rules.heads import merge_heads
from reptool.graph.rules.memories import merge_memories
from reptool.graph.rules.packed import unpack_heads
from reptool.graph.rules.pairs import choose_by_sigmoid
from reptool.graph.rules.permutations import absorb_permutations
from reptool.graph.rules.plain import write_plainly
from reptool.graph.rules.products import write_out_products
from reptool.graph.rules.residuals import add_identities
from reptool.graph.rules.scalars import place_numbers
from reptool.graph.rules.siblings import stack_siblings
from reptool.graph.rules.slides import slide_back
from reptool.graph.rules.softmax import drop_constants
from reptool.graph.rules.spellings import respell
from reptool.graph.rules.spread import spread
from reptool.graph.rules.stacks import stack_branches
from reptool.graph.rules.sums import apply_once
from reptool.graph.rules.tokens import commute_with_tokens, write_out_sums
from reptool.graph.rules.windows import flatten_windows

if TYPE_CHECKING:
    from reptool.graph.cost import Cost
    from reptool.graph.draft import Draft


def revise(draft: Draft, cost: Cost) -> None:
    """Bring together what can be folded; see each rule for its law.

    Constants are dropped last: only then is known which layers have one, as a norm's shift went into what follows it.
    """
    tidy(draft)
    write_plainly(draft)
    read_borders(draft)
    write_out_sums(draft)
    respell(draft)
    write_out_products(draft)
    unfold_heads(draft)
    place_numbers(draft)
    absorb_permutations(draft)
    scale_branches(draft)
    stack_branches(draft, cost)
    hand_gains_back(draft)
    flatten_windows(draft, cost)
    flatten_scales(draft)
    apply_once(draft, cost)
    run_in_batches(draft, cost)
    choose_by_sigmoid(draft)
    hand_factors_back(draft)
    add_identities(draft, cost)
    slide_back(draft, cost)
    commute_with_tokens(draft, cost)
    spread(draft)
    raise_gates(draft, cost)
    unpack_heads(draft)
    drop_constants(draft)
    scale_gates(draft, cost)
    merge_heads(draft, cost)
    merge_memories(draft, cost)
    centre_maps(draft)
    stack_siblings(draft, cost)
    tidy(draft)
    allow_any_layout(draft)
