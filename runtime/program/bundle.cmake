# Runs at install: copies the shared libraries that the program needs into lib/lolcats, where the program's RPATH looks
# first, so that the installed tree can be moved to a machine without them. oneDNN, opened at run time if it is there,
# stays behind.
set(root "$ENV{DESTDIR}${CMAKE_INSTALL_PREFIX}")
set(into "${root}/lib/lolcats")
set(skip "ld-linux.*" "libc\\.so.*" "libm\\.so.*" "libdl\\.so.*" "libpthread\\.so.*" "librt\\.so.*" "libasan.*" "libubsan.*"
    "libcuda\\.so.*" "libcublas.*" "libnv.*") # a GPU's driver and its toolkit's libraries are that machine's own

file(GLOB plugins "${root}/lib/lolcats/liblolcats_*.so")

file(GET_RUNTIME_DEPENDENCIES EXECUTABLES "${root}/bin/lolcats" LIBRARIES ${plugins}
    RESOLVED_DEPENDENCIES_VAR found UNRESOLVED_DEPENDENCIES_VAR missing
    PRE_EXCLUDE_REGEXES ${skip} POST_EXCLUDE_REGEXES "^${into}/")
foreach(path IN LISTS found)
    get_filename_component(name "${path}" NAME)
    get_filename_component(real "${path}" REALPATH)
    message(STATUS "Bundling ${name}")
    file(MAKE_DIRECTORY "${into}")
    file(COPY_FILE "${real}" "${into}/${name}" ONLY_IF_DIFFERENT)
endforeach()
if(missing)
    message(STATUS "Not bundled, not found here: ${missing}")
endif()
