"""``reptool models``: the table of the zoo."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from reptool.commands import console

if TYPE_CHECKING:
    from reptool.models import ModelCard


@click.command()
@click.option("--family", help="Only this family, such as repvgg, cbam or resmlp.")
@click.option("--blocks", is_flag=True, help="The blocks that networks are made of, instead of networks.")
@click.option("--json", "as_json", is_flag=True, help="Print all claims of the cards as JSON.")
def models(family: str | None, blocks: bool, as_json: bool) -> None:
    """List the networks that can be built, recognised and fused.

    \b
    Examples:
      reptool models --family repvgg
      reptool models --blocks
    """  # noqa: D301  # click reads the backslashes
    from reptool.models import card, family_of, list_models, natural_order  # noqa: PLC0415

    names = sorted(list_models(family, blocks=blocks), key=lambda name: (family_of(name), natural_order(name)))
    cards = {name: card(name) for name in names}
    if as_json:
        rows = [_claims(name, family_of(name), claims) for name, claims in cards.items()]
        console.as_json({"schema_version": 2, "models": rows})
        return
    heads = ("name", "paper", "year", "parameters", "fused", "MMAC", "fused", "input", "top-1 as published")
    console.table(heads, [_row(name, claims) for name, claims in cards.items()])


def _claims(name: str, family: str, claims: ModelCard) -> dict[str, Any]:
    return {
        "name": name,
        "family": family,
        "title": claims.paper,
        "paper": f"arXiv:{claims.arxiv}" if claims.arxiv else None,
        "year": claims.year,
        "upstream": claims.upstream,
        "licence": claims.licence,
        "differences": list(claims.differences),
        "input": list(claims.input),
        "inputs": claims.arity,
        "parameters": claims.parameters,
        "deploy_parameters": claims.deploy_parameters,
        "macs": claims.macs,
        "deploy_macs": claims.deploy_macs,
        "deploy": dict(claims.deploy),
        "top1": claims.top1,
        "top1_source": claims.top1_source,
        "published": list(claims.published),
    }


def _row(name: str, claims: ModelCard) -> tuple[str, ...]:
    sample = "x".join(map(str, claims.input))
    return (
        name,
        f"arXiv:{claims.arxiv}" if claims.arxiv else "",
        str(claims.year),
        f"{claims.parameters:,}",
        _number(claims.deploy_parameters),
        _millions(claims.macs),
        _millions(claims.deploy_macs),
        f"{claims.arity} x {sample}" if claims.arity > 1 else sample,
        "" if claims.top1 is None else str(claims.top1),
    )


def _number(count: int | None) -> str:
    return "" if count is None else f"{count:,}"


def _millions(count: int | None) -> str:
    """Multiply-accumulates in millions, with a digit behind the point where there are few."""
    if count is None:
        return ""
    return f"{count / 1e6:,.0f}" if count >= 1e8 else f"{count / 1e6:,.2f}"
