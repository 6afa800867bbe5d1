-- convert.lua: tensors from one file format into another.
local lc = require "lolcats"
local files = lc.files

local args = lc.args {
    "Writes the tensors of a file or folder in another format, a piece at a time: names, values and order of q/k " ..
    "rows stay as they are. From: safetensors, PyTorch (.pt, .bin, distributed checkpoints), GGUF, shards. To: " ..
    ".safetensors, .pt, .bin, .gguf, or a folder, which gets shards and an index where it is large. With --model a " ..
    "model becomes a Hugging Face folder. A saved student into NAME.pt becomes the reference's files, NAME_distill.pt " ..
    "and NAME_ft.pt.",
    { "from", lc.required, "a file or folder", positional = true },
    { "to", lc.required, "a file, whose ending says the format, or a folder", positional = true },
    { "dtype", "", "of floating-point tensors: f32, bf16, f16, f64; into .gguf also q8_0, q5_1, q5_0, q4_1, q4_0. " ..
      "Blocks that the format does not hold become f16" },
    { "max_shard", 5.0, "GB a file of a folder", min = 0.001 },
    { "model", false,
        "load `from` as a model (a GGUF's names and q/k rows are brought to Hugging Face's) and save it as a folder" },
}

local t0 = lc.now()
if args.model then
    local weights = require "lolcats.models.weights"
    local model = lc.load(args.from, { dtype = args.dtype ~= "" and args.dtype or "f32" })
    weights.save(model, args.to, { max_shard = args.max_shard * 1e9 })
    print(("%s: a model folder, %.1f s"):format(args.to, lc.now() - t0))
elseif files.exists(args.from .. "/student.json") and args.to:match "%.pt$" then
    for _, path in ipairs(require("lolcats.reference_checkpoint").export(args.from, (args.to:gsub("%.pt$", "")))) do
        print(path)
    end
else
    local n, shards = require("lolcats.convert").convert(args.from, args.to,
        { dtype = args.dtype ~= "" and args.dtype or nil, max_shard = args.max_shard * 1e9 })
    print(("%s: %d tensors%s, %.1f s"):format(args.to, n, shards > 1 and (" in %d files"):format(shards) or "",
        lc.now() - t0))
end
