# Runs at install: copies the shared libraries that the program needs (and oneDNN, which it opens at run time) into
# lib/lolcats, where the program's RPATH looks first, so that the installed tree can be moved to a machine without them.
set(root "$ENV{DESTDIR}${CMAKE_INSTALL_PREFIX}")
set(into "${root}/lib/lolcats")
set(skip "ld-linux.*" "libc\\.so.*" "libm\\.so.*" "libdl\\.so.*" "libpthread\\.so.*" "librt\\.so.*" "libasan.*" "libubsan.*")

set(extra "")
foreach(version 3 2)
    find_library(LC_DNNL_${version} NAMES libdnnl.so.${version})
    if(LC_DNNL_${version})
        list(APPEND extra ${LC_DNNL_${version}})
        break()
    endif()
endforeach()
file(GLOB plugins "${root}/lib/lolcats/liblolcats_*.so")

file(GET_RUNTIME_DEPENDENCIES EXECUTABLES "${root}/bin/lolcats" LIBRARIES ${extra} ${plugins}
    RESOLVED_DEPENDENCIES_VAR found UNRESOLVED_DEPENDENCIES_VAR missing
    PRE_EXCLUDE_REGEXES ${skip} POST_EXCLUDE_REGEXES "^${into}/")
foreach(path IN LISTS found extra)
    get_filename_component(name "${path}" NAME)
    get_filename_component(real "${path}" REALPATH)
    message(STATUS "Bundling ${name}")
    file(MAKE_DIRECTORY "${into}")
    file(COPY_FILE "${real}" "${into}/${name}" ONLY_IF_DIFFERENT)
endforeach()
if(missing)
    message(STATUS "Not bundled, not found here: ${missing}")
endif()
