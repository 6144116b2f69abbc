"""Python lines that use a trained adapter with a pipeline of Transformers."""

from __future__ import annotations


def pipeline_lines(
    task: str, model: str, processor: tuple[str, str], base: str, folder: str, value: str, options: str = ""
) -> str:
    """Lines that load the adapter in ``folder`` onto the model ``base``, and predict for ``value``.

    Args:
        task: the pipeline's name.
        model: the name of the class that loads the model.
        processor: the name of the pipeline's argument for the tokenizer or image processor, and the name of its class.
        base: the base model's folder or hub name.
        folder: the adapter's folder, which also holds the configuration and the processor.
        value: the example to predict.
        options: more arguments of the pipeline, as source code that begins with a comma.
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
