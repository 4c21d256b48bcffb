"""The registry: looking networks up, refusing what is not known, and the cards."""

from __future__ import annotations

import dataclasses

import pytest

import reptool.models
from reptool.errors import InputError, UnknownModelError
from reptool.models import card, create_model, family_of, list_models, registry

BUILT = list_models()


def test_names_are_sorted_and_of_their_family():
    """Names come in alphabetical order, and each family lists exactly the names it has."""
    assert sorted(BUILT) == BUILT
    assert "repvgg_a0" in BUILT
    for family in {family_of(name) for name in BUILT}:
        assert list_models(family) == [name for name in BUILT if family_of(name) == family]
    assert "acnet_resnet18" not in list_models("repvgg")


def test_unknown_model_names_the_nearest():
    """The message for a misspelled model says what, why, and which name is meant."""
    with pytest.raises(UnknownModelError) as error:
        create_model("RepVGG-A9")
    assert str(error.value).splitlines() == [
        "no model is called 'RepVGG-A9'",
        f"  why   {len(BUILT) + len(list_models(blocks=True))} model names are registered and this is none of them",
        "  do    use 'repvgg_a2', or choose among those `reptool models` prints",
    ]


def test_unknown_model_unlike_any_gets_no_suggestion():
    """Control: where nothing is near, nothing is suggested."""
    with pytest.raises(UnknownModelError) as error:
        create_model("xyzzy")
    assert str(error.value).endswith("do    choose among those `reptool models` prints")


@pytest.mark.parametrize("look_up", [card, family_of, create_model])
def test_every_look_up_refuses_an_unknown_name(look_up):
    """Cards, families and networks are refused alike for a name that is not known."""
    with pytest.raises(UnknownModelError, match="no model is called 'repvgg_c0'"):
        look_up("repvgg_c0")


def test_unknown_family_is_refused():
    """A family without networks is an error that names the nearest, not an empty list."""
    with pytest.raises(UnknownModelError, match=r"no family is called 'repvg'(.|\n)*use 'repvgg'"):
        list_models("repvg")


def test_wrong_argument_is_refused():
    """An argument the network does not take is refused with those it takes."""
    with pytest.raises(InputError) as error:
        create_model("repvgg_a0", classes=10)
    assert str(error.value).splitlines() == [
        "'repvgg_a0' cannot be built with classes=10",
        "  why   got an unexpected keyword argument 'classes'",
        "  do    choose among num_classes",
    ]
    assert create_model("repvgg_a0", num_classes=10).linear.out_features == 10


def test_a_name_is_registered_once():
    """A second network under a name is a mistake in the code, and is reported with the name."""
    with pytest.raises(ValueError, match="'repvgg_a0' is registered twice"):
        registry.register("repvgg_a0", "repvgg", card("repvgg_a0"))


@pytest.mark.parametrize("name", BUILT)
def test_card_is_complete(name):
    """A card names its paper, code and licence, counts what is left after fusing, and gives accuracy with a source."""
    claims = card(name)
    assert claims.paper
    assert claims.licence
    assert claims.upstream.count("/") == 1
    assert claims.upstream.count("@") <= 1  # code that is no longer at a known commit has none
    assert len(claims.input) == 3
    assert claims.deploy_parameters is None or claims.deploy_parameters > 0
    assert (
        claims.deploy_macs is None or claims.deploy_macs <= claims.macs
    )  # a fused matrix may hold more, and costs less
    assert all(count > 0 for count in claims.deploy.values())
    assert all(sentence.endswith(".") for sentence in claims.differences)
    assert (claims.top1 is None) == (claims.top1_source is None)


def test_card_cannot_be_changed():
    """A claim, once made, stands."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        card("repvgg_a0").parameters = 0


def test_public_names_exist():
    """What the package exports is there."""
    assert all(hasattr(reptool.models, name) for name in reptool.models.__all__)
