-- weights.lua: converts what tests/peers/weights.py wrote, for Python to read again.
--   lolcats tests/peers/weights.lua FOLDER
local files = require "lolcats.files"
local convert = require "lolcats.convert"
local folder = arg and arg[1] or ""

files.make_dirs(folder .. "/ours")
for _, name in ipairs(files.list(folder)) do
    local stem = name:match "^(.*)%.%w+$" or name
    local path = folder .. "/" .. name
    if name ~= "want" and name ~= "ours" then
        local opts = name:match "%.gguf$" and { dtype = "f32" } or nil
        convert.convert(path, folder .. "/ours/" .. stem .. ".safetensors", opts)
        convert.convert(path, folder .. "/ours/" .. stem .. ".pt", opts)
    end
end
for _, dtype in ipairs { "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "f16", "bf16" } do
    convert.convert(folder .. "/floats.safetensors", folder .. "/ours/floats." .. dtype .. ".gguf", { dtype = dtype })
end
convert.convert(folder .. "/blocks.gguf", folder .. "/ours/blocks.gguf")
