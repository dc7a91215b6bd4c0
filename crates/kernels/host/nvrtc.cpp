// libnvrtc.so.13: compiles kernels with the host C++ compiler. The "cubin" is a shared library that
// the stand-in of the driver loads.
//
// The version is that of the sources it was built from, so that a cache of cubins never mixes them
// with those of a real compiler or of another version of the shim.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <sys/wait.h>
#include <utility>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace {

namespace fs = std::filesystem;

enum Code : int {
    SUCCESS = 0,
    OUT_OF_MEMORY = 1,
    PROGRAM_CREATION_FAILURE = 2,
    INVALID_INPUT = 3,
    INVALID_PROGRAM = 4,
    INVALID_OPTION = 5,
    COMPILATION = 6,
};

struct Program {
    std::string name, source;
    std::vector<std::pair<std::string, std::string>> headers;
    std::string log, library;
};

const char* const IGNORED[] = {"-std=",      "--std=",   "--ptxas-options=", "-arch",
                               "--use_fast", "--fmad",   "-default-device",  "--extra-device",
                               "-lineinfo",  "--device", "-G",               "-D"};

bool starts_with(const char* text, const char* start) {
    return strncmp(text, start, strlen(start)) == 0;
}

bool known_option(const char* option) {
    if (starts_with(option, "--gpu-architecture=")) {
        const char* value = strchr(option, '=') + 1;
        return starts_with(value, "sm_") || starts_with(value, "compute_");
    }
    for (const char* ignored : IGNORED) {
        if (starts_with(option, ignored)) {
            return true;
        }
    }
    return false;
}

// The folder of this library, which holds shim.h and the driver's stand-in too.
fs::path home() {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(&home), &info);
    return fs::absolute(info.dli_fname).parent_path();
}

std::string read(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
}

bool write(const fs::path& path, const std::string& text) {
    std::ofstream file(path, std::ios::binary);
    file << text;
    file.close();
    return file.good();
}

// As one word of a shell command.
std::string quoted(const std::string& text) {
    std::string out = "'";
    for (char c : text) {
        out += c == '\'' ? std::string("'\\''") : std::string(1, c);
    }
    return out + "'";
}

// A folder that is removed with all that is in it.
struct Folder {
    fs::path path;
    Folder() {
        std::string pattern = (fs::temp_directory_path() / "ferrotune-nvrtc-XXXXXX").string();
        const char* made = mkdtemp(pattern.data());
        path = made != nullptr ? made : "";
    }
    ~Folder() {
        std::error_code ignored;
        fs::remove_all(path, ignored);
    }
};

int compile(Program& program) {
    const Folder folder;
    const fs::path source = folder.path / fs::path(program.name).filename();
    const fs::path library = folder.path / "kernels.so", log = folder.path / "log";
    bool written = !folder.path.empty() && write(source, program.source);
    for (const auto& [name, text] : program.headers) {
        written = written && write(folder.path / fs::path(name).filename(), text);
    }
    if (!written) {
        program.log = "cannot write to the temporary folder";
        return PROGRAM_CREATION_FAILURE;
    }
    // Each library has its own SHARED variables: hidden, and never unique in the process.
    const std::string command =
        std::string(FERROTUNE_HOST_COMPILER " " FERROTUNE_HOST_FLAGS
                    " -std=c++17 -fPIC -shared -fvisibility=hidden -fno-gnu-unique -Wall"
                    " -Wno-unknown-pragmas -DFERROTUNE_HOST -x c++ ") +
        quoted(source) + " -x none -I " + quoted(folder.path) + " -I " + quoted(home()) + " " +
        quoted(home() / "libcuda.so.1") + " -o " + quoted(library) + " >" + quoted(log) + " 2>&1";
    const int status = system(command.c_str());
    program.log = read(log);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
        return COMPILATION;
    }
    program.library = read(library);
    return SUCCESS;
}

int copy_out(const std::string& from, char* to) {
    if (from.empty()) {
        return INVALID_PROGRAM;
    }
    memcpy(to, from.data(), from.size());
    return SUCCESS;
}

} // namespace

API int nvrtcVersion(int* major, int* minor) {
    *major = 13;
    *minor = FERROTUNE_HOST_VERSION;
    return SUCCESS;
}

API const char* nvrtcGetErrorString(int code) {
    switch (code) {
    case SUCCESS:
        return "NVRTC_SUCCESS";
    case OUT_OF_MEMORY:
        return "NVRTC_ERROR_OUT_OF_MEMORY";
    case PROGRAM_CREATION_FAILURE:
        return "NVRTC_ERROR_PROGRAM_CREATION_FAILURE";
    case INVALID_INPUT:
        return "NVRTC_ERROR_INVALID_INPUT";
    case INVALID_PROGRAM:
        return "NVRTC_ERROR_INVALID_PROGRAM";
    case INVALID_OPTION:
        return "NVRTC_ERROR_INVALID_OPTION";
    case COMPILATION:
        return "NVRTC_ERROR_COMPILATION";
    default:
        return "NVRTC_ERROR unknown";
    }
}

API int nvrtcCreateProgram(Program** program, const char* source, const char* name, int count,
                           const char* const* headers, const char* const* names) {
    if (source == nullptr || count < 0) {
        return INVALID_INPUT;
    }
    auto* made = new Program;
    made->name = name != nullptr ? name : "default_program";
    made->source = source;
    for (int i = 0; i < count; i++) {
        made->headers.emplace_back(names[i], headers[i]);
    }
    *program = made;
    return SUCCESS;
}

API int nvrtcDestroyProgram(Program** program) {
    delete *program;
    *program = nullptr;
    return SUCCESS;
}

API int nvrtcCompileProgram(Program* program, int count, const char* const* options) {
    for (int i = 0; i < count; i++) {
        if (!known_option(options[i])) {
            program->log = std::string("unrecognized option ") + options[i];
            return INVALID_OPTION;
        }
    }
    return compile(*program);
}

API int nvrtcGetProgramLogSize(Program* program, size_t* size) {
    *size = program->log.size() + 1;
    return SUCCESS;
}
API int nvrtcGetProgramLog(Program* program, char* log) {
    memcpy(log, program->log.c_str(), program->log.size() + 1);
    return SUCCESS;
}

API int nvrtcGetCUBINSize(Program* program, size_t* size) {
    *size = program->library.size();
    return SUCCESS;
}
API int nvrtcGetCUBIN(Program* program, char* cubin) { return copy_out(program->library, cubin); }

// The same library stands for PTX.
API int nvrtcGetPTXSize(Program* program, size_t* size) { return nvrtcGetCUBINSize(program, size); }
API int nvrtcGetPTX(Program* program, char* ptx) { return nvrtcGetCUBIN(program, ptx); }

namespace {
const int ARCHITECTURES[] = {80, 86, 89, 90, 100, 120};
}

API int nvrtcGetNumSupportedArchs(int* count) {
    *count = static_cast<int>(std::size(ARCHITECTURES));
    return SUCCESS;
}
API int nvrtcGetSupportedArchs(int* archs) {
    memcpy(archs, ARCHITECTURES, sizeof(ARCHITECTURES));
    return SUCCESS;
}
