-- merge.lua: adapters added into the weights, as a model folder that needs no adapter any more.
local lc = require "lolcats"
local files = require "lolcats.files"

local args = lc.args {
    "Adds the adapters of a PEFT folder, or of a saved student, into the weights of its base model. A student becomes " ..
    "a folder of its own (feature maps) beside the merged base: OUT and OUT/base.",
    { "adapter", lc.required, "a PEFT adapter folder, or a saved student", positional = true },
    { "out", lc.required, "folder to write", positional = true },
    { "base", "", "the base model, where the adapter does not name it or it lies elsewhere" },
    { "dtype", "f32", "of the weights that are written", choices = { "f32", "bf16", "f16", "f64" } },
    { "device", "cpu", "where to compute" },
}

-- Files that go with a model, beside its weights.
local BESIDE = { "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
                 "added_tokens.json", "generation_config.json", "chat_template.jinja", "vocab.json", "merges.txt" }

local function copy_beside(from, to)
    if not from or not files.is_dir(from) then return end
    for _, name in ipairs(BESIDE) do
        if files.exists(from .. "/" .. name) then files.write(to .. "/" .. name, files.read(from .. "/" .. name)) end
    end
end

local t0 = lc.now()
local model = lc.load(args.adapter, { base = args.base ~= "" and args.base or nil, device = args.device,
                                      dtype = args.dtype == "f64" and "f64" or "f32" })
local source = model.source
if not model.lora then lc.fail("%s has no adapters to merge", args.adapter) end
model:merge_lora()
lc.lora.drop(model)
local weights_in = model.is_student and args.out .. "/base" or args.out
files.make_dirs(weights_in)
local maps = model.is_student and model:map_params()
lc.no_grad(function() model:cast_weights(args.dtype) end)
model:save_weights(weights_in)
local ok, folder = pcall(lc.hub.resolve, source, {})
copy_beside(ok and folder or source, weights_in)
if model.is_student then
    model.source = weights_in
    model:save(args.out)
end
local extra = maps and (", %d parameters of feature maps"):format(#maps) or ""
print(("%s: %d weights in %s%s, %.1f s"):format(args.out, #model:weight_names(), args.dtype, extra, lc.now() - t0))
