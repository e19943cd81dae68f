"""What every command is: options in groups, -q and -v, errors in one line."""

import click
import cloup

from sflow_jax.commands import console
from sflow_jax.commands.output import listen, quiet_option, verbose_option

# Title of a group → the options in it, of whatever command. The rest, such as --help, comes last.
GROUPS = {
    "What to paint": (
        "prompt", "prompts", "prompt_file", "image", "inversion", "before", "pick", "edits", "edit_prompt", "jobs",
        "from_", "negative", "seed", "seeds", "limit",
    ),
    "What to look at": ("points", "words", "step_by_step", "compared", "plan", "verify"),
    "Benchmark": (
        "known_answers", "pie", "captions", "photos", "draw_pie", "scenes", "methods", "layers_alone", "beside",
        "turns", "sources",
    ),
    "Size and solver": (
        "height", "width", "size", "steps", "guidance", "solver", "nudge", "unnudge", "replay", "skip_layers",
        "skip_scale", "skip_window",
    ),
    "Method": (
        "method", "list_methods", "strength", "keys_only", "values_only", "begin", "until", "lock_until",
        "extended", "assignments",
    ),
    "Layers": (
        "by", "layers", "bypass", "attentions", "windows", "pairs", "top", "threshold", "adaptive", "error",
        "vital_layers",
    ),
    "Region": ("region", "paste", "grow", "soften", "cut", "invert_region"),
    "Many settings": ("try_methods", "try_guidances", "try_strengths", "choose"),
    "Networks that compare": ("features", "clip", "clip_tokenizer", "lpips"),
    "Source": ("text_encoders", "autoencoder", "family", "lora"),
    "Model and machine": (
        "model", "dtype", "attention", "mesh", "quantisation", "quantize", "offload", "text_encoder", "step_cache",
        "batch", "edits_at_once", "kv_cache", "coordinator", "process", "worker",
    ),
    "Page": ("host", "port", "open_browser", "share"),
    "Results": (
        "out", "keep_images", "dry_run", "step_seconds", "save", "force", "unsave", "export", "overwrite", "json",
    ),
}  # fmt: skip
TITLES = {name: title for title, names in GROUPS.items() for name in names}


class Command(cloup.Command):
    """A command whose options are shown in the groups of `GROUPS`, and whose examples keep their line breaks."""

    def __init__(self, *arguments, params: list[click.Parameter], **options):
        groups = {title: cloup.OptionGroup(title) for title in GROUPS}
        for param in params:
            if param.name in TITLES:
                param.group = groups[TITLES[param.name]]
        params = [*params, quiet_option(), verbose_option()]
        super().__init__(*arguments, params=params, **{"context_settings": console.CONTEXT} | options)
        self.option_groups.sort(key=lambda group: list(groups).index(group.title))

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        if self.epilog:
            formatter.write_paragraph()
            with formatter.section("Examples"):
                for line in self.epilog.strip().splitlines():
                    formatter.write_text(line.strip())

    def invoke(self, context: click.Context):
        """Bad input (ValueError) and files that cannot be read or written end with one line and exit code 2."""
        with console.one_line_errors():
            console.use_compilation_cache()
            console.check_addresses(context.params)
            with listen():
                return super().invoke(context)
