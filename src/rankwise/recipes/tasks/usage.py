"""Python lines that use a trained adapter, for tasks that Transformers has a pipeline for."""

from __future__ import annotations


def pipeline_lines(
    task: str, model: str, processor: tuple[str, str], base: str, folder: str, value: str, options: str = ""
) -> str:
    """Lines that load the adapter in ``folder`` onto the model ``base``, and put ``value`` in.

    Args:
        task: the pipeline's name.
        model: the class that loads the model.
        processor: the pipeline's argument for the tokenizer or image processor, and the class that loads it.
        base: the model.
        folder: the adapter's folder, with the configuration and the processor.
        value: what to predict for.
        options: more arguments of the pipeline, as source that begins with a comma.
    """
    argument, loader = processor
    lines = (
        "import rankwise as rw",
        f"from transformers import {', '.join(sorted(['AutoConfig', loader, model]))}, pipeline",
        "",
        f"folder = {folder!r}",
        f"base = {model}.from_pretrained(",
        f"    {base!r}, config=AutoConfig.from_pretrained(folder)",
        ")",
        "model = rw.PeftModel.from_pretrained(base, folder)",
        f"{argument} = {loader}.from_pretrained(folder)",
        f'predict = pipeline("{task}", model=model, {argument}={argument}{options})',
        f"print(predict({value!r}))",
    )
    return "\n".join(lines)
