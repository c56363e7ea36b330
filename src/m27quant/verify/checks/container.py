"""Shards, index and files as files."""

from __future__ import annotations

from m27quant.verify.checks.wording import AGAIN, ERROR, LOADERS, NOTE, REINDEX, WARNING, adder, engines
from m27quant.verify.findings import Check

CHECKS: dict[str, Check] = {}
check = adder(CHECKS)

check(
    "M27-C001", ERROR, "shard is not a readable safetensors file",
    "Its first bytes are no safetensors header: too short, a length that cannot be, no JSON, or a pickle.",
    AGAIN, LOADERS,
)  # fmt: skip
check(
    "M27-C002", ERROR, "git-lfs pointer instead of the file",
    "A clone without git-lfs leaves 130 bytes of text in the place of every large file.",
    "Run `git lfs pull` in the folder, or download with `hf download`.",
    engines("header or JSON error on load", "as vLLM", "as vLLM"),
)  # fmt: skip
check(
    "M27-C003", ERROR, "header entry that lies",
    "The entry's dtype, shape and offsets contradict each other, or one of them is not of this format.",
    AGAIN, LOADERS,
)  # fmt: skip
check(
    "M27-C004", ERROR, "tensors overlap", "Two tensors claim the same bytes: a small file that takes much memory.",
    AGAIN, LOADERS,
)  # fmt: skip
check(
    "M27-C005", ERROR, "hole between tensors", "Bytes of the buffer belong to no tensor.", AGAIN, LOADERS,
)  # fmt: skip
check(
    "M27-C006", ERROR, "shard is truncated", "The file ends before its last tensor does.", AGAIN, LOADERS,
)  # fmt: skip
check(
    "M27-C007", ERROR, "trailing bytes behind the last tensor",
    "The file goes on where its header says that it ends: a file of two formats, or two writes into one.",
    AGAIN, LOADERS,
)  # fmt: skip
check(
    "M27-C008", ERROR, "name twice in one header",
    "JSON readers keep the last of two equal keys, so that the first tensor exists for nobody.",
    "Write the shard again with one entry for each name.",
    engines("the last entry wins, silently", "the last entry wins, silently", "the last entry wins, silently"),
)  # fmt: skip
check(
    "M27-C009", ERROR, "tensor in two shards",
    "The index names one of them; engines that read whole shards take whichever comes last.",
    "Remove the copy that the index does not name.",
    engines("reads every tensor of every shard: the last one wins, silently", "as vLLM", "obeys the index"),
)  # fmt: skip
check(
    "M27-C010", ERROR, "shard of the index is missing", "The index names a file that is not in the folder.",
    "Fetch it: `hf download ORG/NAME FILE --local-dir FOLDER`.",
    engines("FileNotFoundError", "FileNotFoundError", "FileNotFoundError"),
)  # fmt: skip
check(
    "M27-C011", ERROR, "index places a tensor where it is not",
    "The shard that the index names does not hold this tensor.", REINDEX,
    engines("never loaded; memory of the weight stays uninitialized", "never loaded", "KeyError or random weights"),
)  # fmt: skip
check(
    "M27-C012", ERROR, "tensor in a shard, not in the index",
    "Readers that go by the index never see it; those that read whole shards do.", REINDEX,
    engines("loads it", "loads it", "does not load it: random weights"),
)  # fmt: skip
check(
    "M27-C013", WARNING, "shard that the index does not name",
    "A stale or foreign file; loaders that take every shard in the folder mix it into the model.",
    "Remove the file, or add its tensors to the index.",
    engines("ignores it", "ignores it", "ignores it"),
)  # fmt: skip
check(
    "M27-C014", WARNING, "left-over or pickled file",
    "Temporary files are traces of a write that did not end; pickles can run code and are never loaded here.",
    "Remove it once nothing writes to the folder.",
    engines("may load *.bin or *.pt where told to", "as vLLM", "may load *.bin where told to"),
)  # fmt: skip
check(
    "M27-C015", ERROR, "path in the index leaves the folder",
    "A name with separators, a drive, `..` or of no .safetensors file makes a reader open other people's files.",
    "Do not use this checkpoint; ask where it comes from.",
    engines("joins it with the folder", "joins it with the folder", "opens the path"),
)  # fmt: skip
check(
    "M27-C016", ERROR, "link that leaves the folder",
    "The shard is a link to a file outside; copies and uploads of the folder lose or leak it.",
    "Copy the file into the folder.",
    engines("follows it", "follows it", "follows it"),
)  # fmt: skip
check(
    "M27-C017", NOTE, "file that others cannot read",
    "The safetensors library writes 0600: a server under another user cannot open the file.",
    "chmod 644 the files.",
    engines("PermissionError under another user", "as vLLM", "as vLLM"),
)  # fmt: skip
check(
    "M27-C018", ERROR, "index is unreadable",
    "It is no JSON object with a weight_map from names to file names, or a name appears twice in it.", REINDEX,
    engines("error on load, or the last of two entries wins", "as vLLM", "as vLLM"),
)  # fmt: skip
check(
    "M27-C019", ERROR, "several shards without an index",
    "Nothing says which shards belong to the model.", "Fetch model.safetensors.index.json too.",
    engines("reads every file in the folder", "reads every file in the folder", "OSError: no weights"),
)  # fmt: skip
check(
    "M27-C020", WARNING, "total_size is wrong",
    "The index's metadata.total_size is not the bytes of all tensors; planners of memory and downloads trust it.",
    REINDEX, engines("not read", "not read", "used to plan memory"),
)  # fmt: skip
check(
    "M27-C021", ERROR, "single file beside an index",
    "model.safetensors and an index that does not mention it: readers disagree on which is the model.",
    "Remove the one that is not meant.",
    engines("loads what the index names", "loads what the index names", "loads model.safetensors alone"),
)  # fmt: skip
check(
    "M27-C022", ERROR, "not a regular file", "A directory, fifo, device or broken link in the place of a file.",
    "Put the file itself there.", engines("error or hang on load", "as vLLM", "as vLLM"),
)  # fmt: skip
check(
    "M27-C023", ERROR, "checkpoint could not be verified",
    "The run ended before the checks could say anything: no such folder, no weights in it, a file that may not be "
    "read, a source that is none. Nothing is known about the checkpoint. Report files (`--output-file`) carry this "
    "code; the exit code is that of the fault: 3 where the input is unreadable, 4 where the machine is to blame.",
    "Mend what the message names and run again.",
    {"transformers": "OSError where there are no weights", "vllm": "fails to start", "sglang": "as vLLM"},
)  # fmt: skip
