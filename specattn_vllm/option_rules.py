"""What options have to do with each other: combinations that make no sense are refused, with the way out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specattn_vllm.option_fields import OptionFields


def check(options: OptionFields) -> None:
    """Raise ValueError for the first combination that cannot be meant."""
    for rule in RULES:
        rule(options)


def _clamps_agree(options: OptionFields) -> None:
    if options.max_tokens is not None:
        if options.max_tokens < options.min_tokens:
            raise ValueError(f"max_tokens {options.max_tokens} is below min_tokens {options.min_tokens}: change one")
        if options.max_tokens < options.sink_tokens + options.recent_tokens:
            raise ValueError(
                f"max_tokens {options.max_tokens} is below sink_tokens + recent_tokens "
                f"({options.sink_tokens} + {options.recent_tokens}), which are always kept: raise it or lower those"
            )


def _draft_refresh_has_something_to_refresh(options: OptionFields) -> None:
    if options.refresh_draft_every > 1 and not options.drafts_sparsely:
        raise ValueError(
            f"refresh_draft_every {options.refresh_draft_every} without sparse_draft, where every draft step reads "
            "everything: set sparse_draft=true, or leave it at 1"
        )


def _a_draft_s_ratio_has_a_draft_that_reads_a_part(options: OptionFields) -> None:
    if options.draft_ratio is not None and not options.drafts_sparsely:
        raise ValueError(
            f"draft_ratio {options.draft_ratio:g} without sparse_draft, where every draft step reads everything: set "
            "sparse_draft=true, or leave draft_ratio out"
        )


def _a_sketch_is_searched_in_every_round(options: OptionFields) -> None:
    if options.drafts_by_sketch and options.refresh_draft_every > 1:
        raise ValueError(
            f"refresh_draft_every {options.refresh_draft_every} with method {options.method!r}, whose draft chooses by "
            "a sketch in every round: leave it at 1"
        )


def _audits_have_what_they_need(options: OptionFields) -> None:
    if options.audit_floor is not None and not options.audit_share:
        raise ValueError(
            f"audit_floor {options.audit_floor} without audit_share, so that nothing is measured: set audit_share, "
            "such as to 0.05, or leave audit_floor out"
        )
    if "audit_dense_rounds" in options.model_fields_set and options.audit_floor is None:
        raise ValueError(
            f"audit_dense_rounds {options.audit_dense_rounds} without audit_floor, below which it would begin: set "
            "audit_floor, or leave it out"
        )


def _one_rule_is_meant(options: OptionFields) -> None:
    if options.rule is None and {"top_p", "ratio"} <= options.model_fields_set:
        raise ValueError(
            f"top_p {options.top_p} and ratio {options.ratio} are of two rules: give one of them, or say which holds "
            "(rule='top_p' or rule='top_k')"
        )


def _bonus_row_has_steps_to_join(options: OptionFields) -> None:
    if "bonus_row" in options.model_fields_set and options.bonus_row and options.combine == "union":
        raise ValueError(
            "bonus_row true with combine 'union', which looks at one draft step at a time: set combine to 'sum', or "
            "leave bonus_row out"
        )


RULES = (
    _clamps_agree,
    _draft_refresh_has_something_to_refresh,
    _a_draft_s_ratio_has_a_draft_that_reads_a_part,
    _a_sketch_is_searched_in_every_round,
    _audits_have_what_they_need,
    _one_rule_is_meant,
    _bonus_row_has_steps_to_join,
)
