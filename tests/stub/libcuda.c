/* A driver without a GPU: what lightning_hinm/kernels.py asks of libcuda.so.1, strict where the real one is.
 *
 * Environment, read at each call:
 *   STUB_RECORD       file that gets one line of JSON per recorded call (none: nothing is recorded)
 *   STUB_INIT         what cuInit returns (0)
 *   STUB_DRIVER       what cuDriverGetVersion says (12080)
 *   STUB_DEVICES      number of devices (2)
 *   STUB_CAPABILITY   of every device: 90 is 9.0 (90)
 *   STUB_OPTIN        largest shared memory of a block, in bytes (232448)
 *   STUB_STATIC       static shared memory of every function, in bytes (1024)
 *   STUB_MISSING      names, separated by commas, that this driver does not have ()
 *   STUB_JIT          what loading a module returns (0); STUB_JIT_LOG is then its log; STUB_JIT_TIME its milliseconds
 *   STUB_LAUNCH       what cuLaunchKernel returns (0)
 *   STUB_PARAMETERS   sizes in bytes of the parameters of each function: "name=8,8,4;other=8" ()
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int CUresult; /* CUDA_ERROR_... */
enum { SUCCESS = 0, INVALID_VALUE = 1, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, INVALID_PTX = 218, INVALID_CONTEXT = 201,
       INVALID_HANDLE = 400, NOT_FOUND = 500 };
enum { SHARED_PER_BLOCK_OPTIN = 97, CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76 }; /* CU_DEVICE_ATTRIBUTE_... */
enum { SHARED_SIZE_BYTES = 1, MAX_DYNAMIC_SHARED_SIZE_BYTES = 8 };                  /* CU_FUNC_ATTRIBUTE_... */
enum { ERROR_LOG_BUFFER = 5, ERROR_LOG_BUFFER_SIZE_BYTES = 6 };                     /* CU_JIT_... */

typedef struct { int device; } Context;
typedef struct { Context *context; char *text; } Module;
typedef struct { Context *context; char name[64]; int max_dynamic, count, sizes[32]; } Function;

static Context primary[16];
static __thread Context *stack[16]; /* of this thread; the current context is the uppermost */
static __thread int depth;
static pid_t started;

static const char *variable(const char *name, const char *otherwise) {
    const char *value = getenv(name);
    return value ? value : otherwise;
}
static int number(const char *name, int otherwise) {
    const char *value = getenv(name);
    return value ? atoi(value) : otherwise;
}
static Context *current(void) { return depth ? stack[depth - 1] : NULL; }

#define RECORD(...)                                                                                                    \
    do {                                                                                                               \
        const char *path_ = getenv("STUB_RECORD");                                                                     \
        FILE *file_ = path_ ? fopen(path_, "a") : NULL;                                                                \
        if (file_) {                                                                                                   \
            fprintf(file_, __VA_ARGS__);                                                                               \
            fclose(file_);                                                                                             \
        }                                                                                                              \
    } while (0)

CUresult cuInit(unsigned flags) {
    int result = started && started != getpid() ? NOT_INITIALIZED : number("STUB_INIT", SUCCESS);
    RECORD("{\"call\": \"cuInit\", \"flags\": %u}\n", flags);
    if (result == SUCCESS) started = getpid();
    return result;
}
CUresult cuDriverGetVersion(int *version) {
    *version = number("STUB_DRIVER", 12080);
    return SUCCESS;
}
CUresult cuGetErrorName(CUresult error, const char **text) {
    static char name[64];
    snprintf(name, sizeof name, "CUDA_ERROR_STUB_%d", error);
    *text = name;
    return SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
    static char words[64];
    snprintf(words, sizeof words, "the words of error %d", error);
    *text = words;
    return SUCCESS;
}
CUresult cuDeviceGetCount(int *count) {
    if (started != getpid()) return NOT_INITIALIZED;
    *count = number("STUB_DEVICES", 2);
    return SUCCESS;
}
CUresult cuDeviceGet(int *device, int ordinal) {
    if (started != getpid()) return NOT_INITIALIZED;
    *device = ordinal;
    return ordinal < number("STUB_DEVICES", 2) ? SUCCESS : INVALID_DEVICE;
}
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
    int capability = number("STUB_CAPABILITY", 90);
    if (started != getpid()) return NOT_INITIALIZED;
    if (device >= number("STUB_DEVICES", 2)) return INVALID_DEVICE;
    switch (attribute) {
    case SHARED_PER_BLOCK_OPTIN: *value = number("STUB_OPTIN", 232448); return SUCCESS;
    case CAPABILITY_MAJOR: *value = capability / 10; return SUCCESS;
    case CAPABILITY_MINOR: *value = capability % 10; return SUCCESS;
    default: return INVALID_VALUE;
    }
}
CUresult cuDevicePrimaryCtxRetain(Context **context, int device) {
    if (started != getpid()) return NOT_INITIALIZED;
    primary[device].device = device;
    *context = &primary[device];
    return SUCCESS;
}
CUresult cuCtxGetCurrent(Context **context) {
    if (started != getpid()) return NOT_INITIALIZED;
    *context = current();
    return SUCCESS;
}
CUresult cuCtxSetCurrent(Context *context) {
    depth = depth ? depth : 1;
    stack[depth - 1] = context;
    return SUCCESS;
}
CUresult cuCtxPushCurrent(Context *context) {
    if (depth == 16) return INVALID_VALUE;
    stack[depth++] = context;
    RECORD("{\"call\": \"cuCtxPushCurrent\", \"device\": %d}\n", context->device);
    return SUCCESS;
}
CUresult cuCtxPopCurrent(Context **context) {
    if (!depth) return INVALID_CONTEXT;
    *context = stack[--depth];
    RECORD("{\"call\": \"cuCtxPopCurrent\", \"device\": %d}\n", (*context)->device);
    return SUCCESS;
}

CUresult cuModuleLoadDataEx(Module **module, const char *text, unsigned count, const int *options, void **values) {
    int result = number("STUB_JIT", SUCCESS);
    usleep(1000 * number("STUB_JIT_TIME", 0));
    if (!current()) return INVALID_CONTEXT;
    RECORD("{\"call\": \"cuModuleLoadDataEx\", \"device\": %d, \"bytes\": %zu}\n", current()->device, strlen(text));
    if (result == SUCCESS && strncmp(text, "//", 2)) result = INVALID_PTX;
    if (result != SUCCESS) {
        char *log = NULL;
        size_t size = 0;
        for (unsigned i = 0; i < count; i++) {
            if (options[i] == ERROR_LOG_BUFFER) log = values[i];
            if (options[i] == ERROR_LOG_BUFFER_SIZE_BYTES) size = (size_t)values[i];
        }
        if (log && size) snprintf(log, size, "%s", variable("STUB_JIT_LOG", ""));
        return result;
    }
    *module = malloc(sizeof(Module));
    (*module)->context = current();
    (*module)->text = strdup(text);
    return SUCCESS;
}
CUresult cuModuleGetFunction(Function **function, Module *module, const char *name) {
    char line[96], key[96];
    snprintf(line, sizeof line, ".entry %s(", name);
    if (!strstr(module->text, line)) return NOT_FOUND;
    *function = calloc(1, sizeof(Function));
    (*function)->context = module->context;
    (*function)->max_dynamic = 48 * 1024 - number("STUB_STATIC", 1024);
    snprintf((*function)->name, sizeof (*function)->name, "%s", name);
    snprintf(key, sizeof key, ";%s=", name);
    char *all = malloc(strlen(variable("STUB_PARAMETERS", "")) + 2);
    sprintf(all, ";%s", variable("STUB_PARAMETERS", ""));
    char *sizes = strstr(all, key);
    if (sizes) {
        sizes += strlen(key);
        while (*sizes >= '0' && *sizes <= '9') {
            (*function)->sizes[(*function)->count++] = (int)strtol(sizes, &sizes, 10);
            sizes += *sizes == ',';
        }
    }
    free(all);
    return SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, int attribute, Function *function) {
    if (attribute != SHARED_SIZE_BYTES) return INVALID_VALUE;
    *value = number("STUB_STATIC", 1024);
    return function ? SUCCESS : INVALID_HANDLE;
}
CUresult cuFuncSetAttribute(Function *function, int attribute, int value) {
    RECORD("{\"call\": \"cuFuncSetAttribute\", \"function\": \"%s\", \"attribute\": %d, \"value\": %d}\n",
           function->name, attribute, value);
    if (attribute != MAX_DYNAMIC_SHARED_SIZE_BYTES) return INVALID_VALUE;
    if (value + number("STUB_STATIC", 1024) > number("STUB_OPTIN", 232448)) return INVALID_VALUE;
    function->max_dynamic = value;
    return SUCCESS;
}
CUresult cuFuncLoad(Function *function) {
    RECORD("{\"call\": \"cuFuncLoad\", \"function\": \"%s\"}\n", function->name);
    return SUCCESS;
}
CUresult cuLaunchKernel(Function *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, void *stream, void **parameters, void **extra) {
    char bytes[32 * 17 + 1] = "";
    int at = 0;
    if (current() != function->context) return INVALID_CONTEXT;
    if (!gx || !gy || !gz || gy > 65535 || gz > 65535 || extra || (int)shared > function->max_dynamic) return INVALID_VALUE;
    for (int i = 0; i < function->count; i++) {
        for (int j = 0; j < function->sizes[i]; j++) at += sprintf(bytes + at, "%02x", ((unsigned char *)parameters[i])[j]);
        bytes[at++] = ' ';
    }
    bytes[at ? at - 1 : 0] = 0;
    RECORD("{\"call\": \"cuLaunchKernel\", \"function\": \"%s\", \"device\": %d, \"grid\": [%u, %u, %u], "
           "\"block\": [%u, %u, %u], \"shared\": %u, \"stream\": %zu, \"parameters\": \"%s\"}\n",
           function->name, function->context->device, gx, gy, gz, bx, by, bz, shared, (size_t)stream, bytes);
    return number("STUB_LAUNCH", SUCCESS);
}

#define NAME(function) {#function, (void *)function}
static const struct { const char *name; void *function; } table[] = {
    NAME(cuInit), NAME(cuDriverGetVersion), NAME(cuGetErrorName), NAME(cuGetErrorString), NAME(cuDeviceGetCount),
    NAME(cuDeviceGet), NAME(cuDeviceGetAttribute), NAME(cuDevicePrimaryCtxRetain), NAME(cuCtxGetCurrent),
    NAME(cuCtxSetCurrent), NAME(cuCtxPushCurrent), NAME(cuCtxPopCurrent), NAME(cuModuleLoadDataEx),
    NAME(cuModuleGetFunction), NAME(cuFuncGetAttribute), NAME(cuFuncSetAttribute), NAME(cuFuncLoad), NAME(cuLaunchKernel),
};

/* The binding finds this one by dlsym, and everything else through it. */
CUresult cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status) {
    const char *missing = variable("STUB_MISSING", ""), *at = strstr(missing, symbol);
    size_t length = strlen(symbol);
    (void)version, (void)flags;
    *function = NULL;
    if (status) *status = 1; /* CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND */
    if (at && (at[length] == ',' || !at[length])) return NOT_FOUND;
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (!strcmp(table[i].name, symbol)) {
            *function = table[i].function;
            if (status) *status = 0;
            return SUCCESS;
        }
    return NOT_FOUND;
}
