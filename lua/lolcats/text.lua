-- text: tokenizers and the sampler. lc.tokenizer opens a tokenizer.json, a folder that holds one, a GGUF file, or one
-- that is open already.
local core = require "lolcats.core.text"
local bridge = require "lolcats.core.ffi"
local files = require "lolcats.files"
local text = {sample = core.sample}

-- lc.tokenizer(path | file): an object with encode(text[, {special, parse}]), decode(ids[, {skip_special}]), id(s),
-- token(id), size.
function text.tokenizer(source)
  if type(source) == "table" and source.handle then return core.from_file(source) end
  if type(source) ~= "string" then
    bridge.fail("tokenizer: a path or an open GGUF file is needed; got %s", type(source))
  end
  local path = source
  if files.is_folder(path) then
    local inside = files.join(path, "tokenizer.json")
    if not files.is_file(inside) then
      local file = files.open_tensors(path)
      if file.format ~= "gguf" then bridge.raise("EIO", "tokenizer", path .. ": there is no tokenizer.json") end
      return core.from_file(file)
    end
    path = inside
  elseif path:match("%.gguf$") then
    local file = files.open_tensors(path)
    local tokenizer = core.from_file(file)
    file:close()
    return tokenizer
  end
  return core.open(path)
end

return text
