"""The forms of the method, by the value of ``init_lora_weights`` that asks for each."""

from __future__ import annotations

from rankwise.method.forms.form import Form
from rankwise.method.forms.paper import PaperForm
from rankwise.method.forms.principal import PrincipalForm

_FORMS: dict[bool | str, Form] = {
    "principal": PrincipalForm(),
    True: PaperForm(),
    "gaussian": PaperForm(),  # the same, as in PEFT
    False: PaperForm(random=True),
}

# Values of ``init_lora_weights`` in files whose budget counts parameters; "gated" is what an earlier default wrote.
COUNTS_PARAMETERS = ("gated", *(start for start, form in _FORMS.items() if form.counts_parameters))


def form_of(start: bool | str) -> Form:
    """The form that a value of ``init_lora_weights`` asks for.

    Example:
        >>> form_of("principal").name, form_of(True).name
        ('principal', 'paper')
    """
    return _FORMS[start]


__all__ = ["COUNTS_PARAMETERS", "Form", "form_of"]
