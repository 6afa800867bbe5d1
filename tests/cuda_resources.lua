-- cuda_resources.lua: what each CUDA kernel takes of a multiprocessor, as the compiler left it in the plugin: registers, stack, shared
-- memory. A hot kernel with a stack spills registers or indexes an array at run time, and the test fails. Needs the toolkit's cuobjdump,
-- no GPU.
--   lolcats tests/cuda_resources.lua [--plugin build/liblolcats_cuda.so] [--cuobjdump PATH] [--all]
local lc = require "lolcats"

local args = lc.args {
    "List the resources of the CUDA kernels; fail where a hot one spills.",
    { "plugin", "build/liblolcats_cuda.so", "the plugin" },
    { "cuobjdump", "cuobjdump", "the toolkit's program" },
    { "arch", "", "one target, such as sm_90a; empty: all" },
    { "all", false, "list every kernel, not only those with a stack" },
}

-- Where the time of decoding and training goes, in the dtypes of those. Instances for widths that no common model has may be
-- larger than the registers (head dim 128 with 128 inputs of the map).
local HOT = { "gemv_one", "gemv_denseI13__nv_bfloat16Li1", "decode_many", "decode_kernel", "many_features", "query_features",
              "12pairs_kernelILi%d+ELi%d+ELi%d+ELb1", "16pairs_sum_kernel", "13forward_kernelILi%d+ELi%d+ELi64",
              "14forward_kernelILi%d+ELi%d+ELi64", "keys_tile_kernelILi%d+ELi%d+ELi64",
              "queries_tile_kernelILi%d+ELi%d+ELi64", "segment_sums_kernel", "usual_queries_kernel",
              "usual_keys_kernel", "usual_sums_kernel",
              "norm_rowsI13__nv_bfloat16", "norm_back_rowsI13__nv_bfloat16",
              "rope_rowsI13__nv_bfloat16", "swiglu_vectors", "swiglu_row13__nv_bfloat16", "adamw_vectors", "lce_rows", "tiles_forward",
              "tiles_gq", "tiles_gkv", "add_vectors", "add_lists", "adapters_kernelI13__nv_bfloat16Li%d+",
              "adapter_gradsI13__nv_bfloat16Li[123]E" }

-- Bytes on the stack that are known, by target: the gradient of hybrid attention where it is not the usual call's, which
-- has kernels of its own; 128 features of 64 inputs, what the forward keeps from chunk to chunk, four keys at a time in
-- decoding, norms of rows above 8,192. Targets before sm_90 have mma.sync's registers to hold as well.
local KNOWN = {
    { "tile_kernelILi%d+ELi%d+ELi64ELb%dE", 352 }, { "usual_keys_kernelILb1", 32 }, { "usual_queries_kernelILb1", 8 },
    { "forward_kernelILi64ELi128ELi64", 80, "sm_90a" }, { "segment_sums_kernel", 32 }, { "pairs_kernel", 64 },
    { "pairs_sum_kernel", 16 }, { "decode_kernelILi%d+ELi4", 8, "sm_90a" },
    { "norm_back_rowsI13__nv_bfloat16Li8ELb0ELi1024", 16 },
    { "forward_kernelILi%d+ELi%d+ELi64", 96, "sm_8" }, { "decode_kernelILi%d+ELi4", 24, "sm_8" },
    { "decode_manyILi128", 8, "sm_8" }, { "tiles_gkvI[%w_]+Li128ELi128", 8, "sm_8" },
}

local function allowed(name, arch)
    local most = 0
    for _, k in ipairs(KNOWN) do
        if name:find(k[1]) and (not k[3] or arch:find(k[3], 1, true)) then most = math.max(most, k[2]) end
    end
    return most
end

local function is_hot(name)
    for _, pattern in ipairs(HOT) do
        if name:find(pattern) then return true end
    end
    return false
end

local function quote(s) return "'" .. s:gsub("'", "'\\''") .. "'" end
if not lc.files.is_file(args.plugin) then
    print("skipped: there is no plugin " .. args.plugin)
    os.exit(77)
end
local pipe = io.popen(quote(args.cuobjdump) .. " -res-usage " .. quote(args.plugin) .. " 2>&1")
local arch, name, seen, kernels, bad = "?", nil, {}, 0, 0
for line in pipe:lines() do
    arch = line:match "^arch = (%S+)" or arch
    name = line:match "Function ([%w_$]+):" or name
    local regs, stack, shared, here = line:match "REG:(%d+) STACK:(%d+) SHARED:(%d+) LOCAL:(%d+)"
    if regs and name and (args.arch == "" or args.arch == arch) then
        stack = tonumber(stack) + tonumber(here)
        local hot = is_hot(name)
        kernels, seen[arch] = kernels + 1, true
        local over = hot and stack > allowed(name, arch)
        if over then bad = bad + 1 end
        if args.all or stack > 0 then
            print(("%-4s %-8s %-4s registers %3s  stack %4d  shared %6s  %s")
                :format(over and "OVER" or "", arch, hot and "hot" or "", regs, stack, shared, name))
        end
        name = nil
    end
end
pipe:close()
if kernels == 0 then
    print("skipped: " .. args.cuobjdump .. " (of the CUDA toolkit) could not be run, or read no kernels")
    os.exit(77)
end
local archs = {}
for a in pairs(seen) do archs[#archs + 1] = a end
table.sort(archs)
print(("%d kernels for %s; %d hot ones spill more than is known"):format(kernels, table.concat(archs, ", "), bad))
os.exit(bad == 0 and 0 or 1)
