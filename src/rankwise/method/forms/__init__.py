"""The forms of the method, by the value of ``init_lora_weights`` that asks for each."""

from __future__ import annotations

from rankwise.method.forms.form import Form
from rankwise.method.forms.gated import GatedForm
from rankwise.method.forms.paper import PaperForm

_FORMS: dict[bool | str, Form] = {
    "gated": GatedForm(),
    True: PaperForm(),
    "gaussian": PaperForm(),  # the same, as in PEFT
    False: PaperForm(random=True),
}


def form_of(start: bool | str) -> Form:
    """The form that a value of ``init_lora_weights`` asks for.

    Example:
        >>> form_of("gated").name, form_of(True).name
        ('gated', 'paper')
    """
    return _FORMS[start]


__all__ = ["Form", "form_of"]
