from __future__ import annotations

import pytest

from cluster.config import LimitsConfig
from cluster.errors import ModelNotFoundError, UnavailableError
from deployments.routing.router import Router
from tests.unit.fakes import EchoModel


def router_of(*models: EchoModel) -> Router:
    return Router({model.config.name: model for model in models})


def test_a_model_is_found_by_its_name() -> None:
    one, other = EchoModel("one"), EchoModel("other")
    router = router_of(one, other)
    assert router.model("one") is one
    assert router.model("other") is other


def test_an_unknown_model_is_told_with_what_is_served() -> None:
    router = router_of(EchoModel("b"), EchoModel("a"))
    for ask in (router.model, router.card):
        with pytest.raises(ModelNotFoundError, match=r"^model: found 'x', served are a, b$"):
            ask("x")


def test_a_model_without_a_replica_is_known_but_not_available_until_it_has_one() -> None:
    model = EchoModel("slow", ready=False)
    router = router_of(EchoModel("fast"), model)
    assert router.not_ready() == ["slow"]
    with pytest.raises(UnavailableError, match="model slow: no replica is ready yet"):
        router.model("slow")
    assert not router.card("slow").ready
    model.is_ready = True
    assert router.not_ready() == []
    assert router.model("slow") is model
    assert router.card("slow").ready


def test_cards_are_in_the_configuration_s_order_and_say_what_runs() -> None:
    cards = router_of(EchoModel("b"), EchoModel("a", ready=False)).cards()
    assert [(card.id, card.ready) for card in cards] == [("b", True), ("a", False)]
    config = EchoModel("b").config
    assert cards[0][2:6] == (config.family, config.engine, config.ggml_type, config.context)


def test_a_model_has_further_names_which_are_listed_and_not_awaited_twice() -> None:
    model = EchoModel("org/a", ready=False, aliases=("b", "org/c"))
    model.awaited = True
    router = router_of(model)
    assert [(card.id, card.root) for card in router.cards()] == [("org/a", "org/a"), ("b", "org/a"), ("org/c", "org/a")]
    assert router.not_ready() == ["org/a"]
    assert router.model("org/c") is router.model("b") is model
    assert router.card("b").id == "b"
    with pytest.raises(ModelNotFoundError, match=r"served are b, org/a, org/c$"):
        router.model("a")


def test_limits_are_the_operator_s() -> None:
    limits = LimitsConfig(max_tokens=3)
    assert Router({}, limits).limits is limits
    assert Router({}).limits == LimitsConfig()
